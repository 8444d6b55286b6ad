"""What a program costs, from its shapes and from what the compiler says."""
