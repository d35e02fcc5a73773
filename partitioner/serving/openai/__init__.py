"""The OpenAI API as data: what is asked, what is answered, and how it is said that something cannot be done."""
