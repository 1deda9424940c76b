"""Guest RAM: which pages were written, what they held, and putting them back."""
