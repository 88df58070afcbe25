// An MCP server over HTTP, with sessions, by the official TypeScript SDK. Its first line says its port.
import { randomUUID } from "node:crypto";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.MCP_SDKS}/`);
const load = (name) => import(pathToFileURL(require.resolve(`@modelcontextprotocol/sdk/${name}`)));
const { Server } = await load("server/index.js");
const { StreamableHTTPServerTransport } = await load("server/streamableHttp.js");
const { CallToolRequestSchema, ListToolsRequestSchema } = await load("types.js");

const inputSchema = { type: "object", properties: { repo: { type: "string" } }, required: ["repo"] };
const server = new Server({ name: "issues", version: "1" }, { capabilities: { tools: {} } });
server.setRequestHandler(ListToolsRequestSchema, () => ({ tools: [{ name: "get_issue", inputSchema }] }));
server.setRequestHandler(CallToolRequestSchema, ({ params }) => ({
  content: [{ type: "text", text: `an issue of ${params.arguments.repo}` }],
}));
const transport = new StreamableHTTPServerTransport({ sessionIdGenerator: randomUUID });
await server.connect(transport);
const listener = createServer((request, response) => transport.handleRequest(request, response));
listener.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ port: listener.address().port })));
