"""One model on several cards: every card has some of the tokens, and all of them for its heads."""
