"""The book: docs/ and what it links to in the repository, as the source tree of a site."""
