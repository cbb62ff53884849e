"""What a token is: packed tokens, partitions, attention and unmerging; torch alone."""
