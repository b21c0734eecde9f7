"""What `ctdbench new-method` copies: a method that works, and its test, named `new-method`."""
