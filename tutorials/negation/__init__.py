"""A study of one honest negative result: the sentiment-negation circuit of the paper, looked for in another model."""
