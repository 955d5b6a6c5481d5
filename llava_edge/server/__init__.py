"""`llava-edge serve`: a server for this machine that speaks OpenAI's API and Ollama's, and a chat page.

Two processes. The parent speaks HTTP and never loads weights; the child runs the model and has no socket but the one to
its parent. An image can only crash the child, which the parent restarts.
"""
