"""What a run needs and the paper does not speak of; nobody has to read it to understand the method."""
