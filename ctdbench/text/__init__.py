"""Text as bytes: token bytes, alignment, vocabularies. Nothing here uses torch."""
