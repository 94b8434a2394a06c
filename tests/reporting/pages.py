"""A page as a tree of elements, for assertions."""

from html.parser import HTMLParser

VOID = {"meta", "input", "br", "link", "img"}


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, dict(attributes), parent, []

    def __iter__(self):
        """This element and all below it."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            node for node in self if node.tag == tag and all(node.attributes.get(k) == v for k, v in wanted.items())
        ]

    def one(self, tag, **attributes):
        (node,) = self.all(tag, **attributes)
        return node

    @property
    def text(self):
        return "".join(child.text if isinstance(child, Node) else child for child in self.children)

    @property
    def rows(self):
        """Texts of a table's cells."""
        return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in self.all("tr")]


class Page(HTMLParser):
    """Fails where tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.root = self.here = Node("", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.root

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        node = Node(tag, attrs, self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_endtag(self, tag):
        assert tag == self.here.tag
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)

    def section(self, key):
        return self.root.one("section", id=key)

    def table(self, key, caption):
        (found,) = [
            table
            for table in self.section(key).all("table")
            if table.all(
                "caption",
            )[:1]
            and caption in table.all("caption")[0].text
        ]
        return found
