"""The paper's statements, each by code that could find it false."""
