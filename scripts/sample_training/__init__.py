"""Training of the embedded sample pipeline, in stages that can each be interrupted and resumed."""
