"""Extensions of Megatron-core that any project could use; nothing here knows of Search-E1."""
