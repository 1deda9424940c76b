"""The only code that does things in order: observe, execute, recover."""
