"""HTTP targets: the map from requests to verbs and resources, and the Model Context Protocol."""
