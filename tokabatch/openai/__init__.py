"""OpenAI's API as data: bodies of requests in, response and error objects out. No HTTP, no file, no model."""
