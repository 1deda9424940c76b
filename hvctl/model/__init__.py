"""The nouns: frozen dataclasses of the standard library, no behaviour beyond answering questions about themselves."""
