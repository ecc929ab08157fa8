"""A chat model behind an API as the reward."""
