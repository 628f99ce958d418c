"""The commands: each module's main() reads its arguments and prints the result."""
