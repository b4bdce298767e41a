"""SGLang's OpenAI routes, for both sides of a chat."""
