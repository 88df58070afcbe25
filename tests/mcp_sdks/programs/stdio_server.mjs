// An MCP server on standard input and output by the official TypeScript SDK, which a test runs in a sandbox.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.MCP_SDKS}/`);
const load = (name) => import(pathToFileURL(require.resolve(`@modelcontextprotocol/sdk/${name}`)));
const { Server } = await load("server/index.js");
const { StdioServerTransport } = await load("server/stdio.js");
const { CallToolRequestSchema, ListToolsRequestSchema } = await load("types.js");

const inputSchema = { type: "object", properties: { folder: { type: "string" } }, required: ["folder"] };
const server = new Server({ name: "noted", version: "1" }, { capabilities: { tools: {} } });
server.setRequestHandler(ListToolsRequestSchema, () => ({
  tools: ["get_note", "delete_notes"].map((name) => ({ name, inputSchema })),
}));
server.setRequestHandler(CallToolRequestSchema, ({ params: { name, arguments: given } }) => ({
  content: [{ type: "text", text: name === "get_note" ? `a note of ${given.folder}` : `nothing is left of ${given.folder}` }],
}));
await server.connect(new StdioServerTransport());
