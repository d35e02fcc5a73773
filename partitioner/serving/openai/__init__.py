"""The OpenAI API as data: requests, answers, errors."""
