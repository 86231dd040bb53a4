"""What is known of a run before its first step: the order of the prompts and what they share."""
