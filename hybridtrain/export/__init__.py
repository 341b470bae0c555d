"""Export: from any complete checkpoint to a Hugging Face folder.

hf.export    one tensor at a time --> safetensors shards + index (weights) + config + tokenizer
destination: written aside, then put in the place of an earlier one, of which only our own files are replaced
"""
