"""Pure decisions: facts in, a Plan or a Refusal out. Nothing here imports a library that touches the world."""
