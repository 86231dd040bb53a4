"""A server of OpenAI's API over the engine of runs: requests come and go, and what they ask for is one plan at a time."""
