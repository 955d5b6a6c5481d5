"""`llava-edge serve`: an OpenAI-compatible server for this machine, and a chat page.

Two processes. The parent speaks HTTP and never loads weights; the child holds the model and never has a socket but the
one to its parent. What a stranger's picture or file can bring down is the child, which the parent starts again.
"""
