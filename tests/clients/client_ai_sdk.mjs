// The AI SDK: `ai` with `@ai-sdk/openai-compatible` and `@ai-sdk/openai`.

import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, generateText, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';
import { Calls, FILM, KEY, MODEL, QUESTION, check, startServer, version } from './calls.mjs';

const calls = new Calls(`ai ${version('ai')}, @ai-sdk/openai-compatible ${version('@ai-sdk/openai-compatible')}`);
const server = await startServer();
const compatible = createOpenAICompatible({
  name: 'xray',
  baseURL: server.url,
  apiKey: KEY,
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const model = compatible(MODEL);
const openai = createOpenAI({ baseURL: server.url, apiKey: KEY });
const image = FILM.split(',')[1];
const messages = [{ role: 'user', content: [{ type: 'file', mediaType: 'image/png', data: image }, { type: 'text', text: QUESTION }] }];
const base = { model, messages, maxRetries: 0, maxOutputTokens: 200 };
let ran = 0;
const report = tool({
  description: 'Writes down whether the film is normal.',
  inputSchema: z.object({ normal: z.boolean() }),
  execute: async () => { ran += 1; return 'done'; },
});

await calls.passes('generateText with a film', async () => check((await generateText(base)).text, 'no text'));
await calls.passes('streamText', async () => {
  let text = '';
  const result = streamText(base);
  for await (const piece of result.textStream) text += piece;
  check(text && (await result.usage).outputTokens > 0, text);
});
await calls.passes('generateText with Output.object', async () => {
  const output = Output.object({ schema: z.object({ side: z.enum(['left', 'right']), normal: z.boolean() }) });
  const found = await generateText({ ...base, output });
  check(typeof found.output.normal === 'boolean', found.output);
});
await calls.passes('tools: named, run, result sent back', async () => {
  const steps = { 0: { type: 'tool', toolName: 'report' } };
  await generateText({
    ...base,
    tools: { report },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: steps[stepNumber] ?? 'none' }),
  });
  check(ran > 0, ran);
});
await calls.passes('tools: named, stream', async () => {
  const result = streamText({ ...base, tools: { report }, toolChoice: { type: 'tool', toolName: 'report' } });
  const found = await result.toolCalls;
  check(typeof found[0].input.normal === 'boolean', found);
});
await calls.passes('completionModel', async () => {
  const found = await generateText({ model: compatible.completionModel(MODEL), prompt: '心影', maxOutputTokens: 4, maxRetries: 0 });
  check(found.text, found.text);
});
await calls.passes('@ai-sdk/openai chat', async () => check((await generateText({ ...base, model: openai.chat(MODEL) })).text, 'no text'));
await calls.passes('@ai-sdk/openai responses', async () => {
  const found = await generateText({ ...base, model: openai.responses(MODEL), providerOptions: { openai: { store: false } } });
  check(found.text, found.text);
});
await calls.refused('an unknown model', () => generateText({ ...base, model: compatible('gpt-4o') }), 'does not exist');
await calls.refused('embeddingModel', async () => {
  const { embed } = await import('ai');
  await embed({ model: compatible.embeddingModel(MODEL), value: 'a', maxRetries: 0 });
}, 'nothing at this path');
calls.end();
server.stop();
