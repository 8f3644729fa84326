/** Drawings that are not submitted yet, kept in this browser: a closed tab or a crash loses nothing. */

const NAME = 'bipvl-label'
const STORE = 'drawings'

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1)
    request.onupgradeneeded = () => request.result.createObjectStore(STORE)
    request.onsuccess = () => resolve(request.result)
    request.onerror = () => reject(new Error(`This browser keeps no drawings: ${request.error.message}`))
  })
}

async function run(mode, work) {
  const database = await open()
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode)
      const request = work(transaction.objectStore(STORE))
      transaction.oncomplete = () => resolve(request.result)
      transaction.onabort = () => reject(new Error(`The drawing could not be kept in this browser: ${transaction.error?.message}`))
    })
  } finally {
    database.close()
  }
}

/** A kept drawing, {when, volume}, or undefined. */
export const get = id => run('readonly', store => store.get(id))

export const put = (id, kept) => run('readwrite', store => store.put(kept, id))

export const remove = id => run('readwrite', store => store.delete(id))
