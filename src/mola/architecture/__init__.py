"""What a base model consists of, its layers and its linears, and how numbers are spread over them. No weights."""
