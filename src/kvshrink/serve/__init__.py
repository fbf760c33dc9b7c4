"""For engines and servers: pages as records of fixed bytes, a store of prefixes on disk, and what plugs into vLLM.

serve/vllm/ is imported by vLLM's processes alone; nothing else here needs vLLM.
"""
