"""What is heard from a guest and said to it: its agent, its sign of life, its notices."""
