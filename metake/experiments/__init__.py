"""One function per figure or table of the book: parameters in, tidy records (a DataFrame) out. No drawing here."""
