"""The two objects that Flower looks for in its app."""

from orchard import flower_app

client = flower_app.client_app
server = flower_app.server_app
