"""OpenAI's batch files: the job that answers one, and the files of results and errors made of its run."""
