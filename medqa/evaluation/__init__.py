"""How good is it: the loss of a split, and answers to questions."""
