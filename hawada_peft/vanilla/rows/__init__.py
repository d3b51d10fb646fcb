"""The rows of known families, registered when they are imported."""
