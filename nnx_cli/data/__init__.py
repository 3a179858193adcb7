"""From files of text to documents, ids, token folders and batches."""
