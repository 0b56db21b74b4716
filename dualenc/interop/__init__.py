"""Models of other libraries in and out, compared with these libraries by their outputs."""
