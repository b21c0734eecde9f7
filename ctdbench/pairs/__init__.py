"""The shipped pairs, one YAML file each: a student, its teachers and their tokenizers."""
