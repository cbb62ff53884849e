"""Picture -> a score for each superpatch; one method a file."""
