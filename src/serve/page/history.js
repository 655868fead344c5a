// Reports of this browser: text and a thumbnail each, in IndexedDB. Nothing of it is on the server.

const NAME = "xray-reports";
const STORE = "reports";

/** More are dropped, oldest first. */
const MOST = 200;

let opened = null;

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function store(mode) {
  return (await open()).transaction(STORE, mode).objectStore(STORE);
}

/** All records, newest first. Rejects where the browser keeps nothing, in some private windows. */
export async function all() {
  const records = await promise((await store("readonly")).getAll());
  return records.sort((one, other) => other.created - one.created);
}

/** Keeps a record; `id` is its key, `created` in milliseconds. */
export async function keep(record) {
  await promise((await store("readwrite")).put(record));
  const tooMany = (await all()).slice(MOST);
  for (const { id } of tooMany) await remove(id);
}

/** Forgets one. */
export async function remove(id) {
  await promise((await store("readwrite")).delete(id));
}

/** Forgets all. */
export async function clear() {
  await promise((await store("readwrite")).clear());
}
