"""Release of a model: a Hugging Face directory, GGUF files for llama.cpp and Ollama, and an upload to the hub."""
