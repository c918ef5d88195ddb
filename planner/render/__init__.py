"""What a person reads: text helpers and one module for each screen. rich is imported only to draw."""
