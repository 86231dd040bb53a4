"""A server of OpenAI's API over the engine of runs: requests come and go, and their prompts form one plan at a time."""
