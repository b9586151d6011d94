"""The page that ``Explanation.to_html`` makes."""
