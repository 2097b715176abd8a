"""The claims of the exercise sheet, a file a problem, and the end-to-end claims beside them."""
