"""The verbs, a few lines each: what an operator, a playbook and a job call. Start reading hvctl here.

Each takes an open Engine, says what it wants as a decision (observed facts to a plan) and lets the engine do it.
"""
