"""Images, words, benchmarks and everything that is fetched."""
