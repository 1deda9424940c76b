"""Choosing which VMs give their resources back: covers of a need, as cheap as can be, on one of many hosts. Pure:
numbers in, a choice out; numpy and scipy are allowed here, and nowhere else of what decides."""
