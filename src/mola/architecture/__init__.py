"""What a base model consists of: its layers and its linears, and numbers per layer from any notation. No weights."""
