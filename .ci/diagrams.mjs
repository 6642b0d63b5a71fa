// Parses the mermaid blocks of a Markdown file: node diagrams.mjs FILE
import {readFile} from "node:fs/promises";
import mermaid from "mermaid";

const text = await readFile(process.argv[2], "utf8");
const blocks = [...text.matchAll(/^```mermaid\n(.*?)^```$/gms)];
if (blocks.length === 0) throw new Error("no mermaid block found");
for (const [, block] of blocks) console.log(await mermaid.parse(block));
