/**
 * Puts BiPVL Label into the viewer: a mode for MONAI Label that has drawing tools, a list of segments and our panel.
 *
 * Loaded before the viewer's own script, which reads `window.config` (app-config.js). The stock mode of this name has
 * no tools to draw with and no way to submit.
 */

import { Review } from './review/review.js'
import { Session } from './session.js'
import { View } from './view.js'

const PANEL = 'bipvl-label.panelModule.label'
const TOOLS = '@ohif/extension-cornerstone.panelModule.panelSegmentationWithTools'
const LAYOUT = '@ohif/extension-default.layoutTemplateModule.viewerLayout'
const STUDIES = '@ohif/extension-default.panelModule.seriesList'
const VIEWPORTS = [
  ['@ohif/extension-cornerstone.viewportModule.cornerstone', '@ohif/extension-default.sopClassHandlerModule.stack'],
  ['@ohif/extension-cornerstone-dicom-seg.viewportModule.dicom-seg',
    '@ohif/extension-cornerstone-dicom-seg.sopClassHandlerModule.dicom-seg'],
]

// Its menu renames, deletes and exports segmentations; the menus of segments, which lock them, stay.
const NO_MENU = '.bipvl-tools [aria-haspopup="menu"]:not([data-cy="data-row"] *) { display: none }'

const session = new Session()
session.review = new Review(session)
const view = new View(session)

/** What React.createElement returns: the viewer does not export its React (18). */
const element = (type, props, ref = null) => (
  { $$typeof: Symbol.for('react.element'), type, key: props.key ?? null, ref, props, _owner: null, _store: {} })

/** Our part is plain DOM that outlives the panel: closing and opening it keeps what it shows. */
const attach = node => node?.append(view.root)

/**
 * Let the stock menu's "Export DICOM SEG" store. Two commands have its name, and it runs the one that needs to be given
 * an archive, without one. The other gives that one the archive, and tells whether it was stored.
 */
function mendExport(commandsManager) {
  const store = commandsManager.getCommand('storeSegmentation', 'SEGMENTATION')
  if (!store || store.mended) return
  const commandFn = options =>
    options.dataSource ? store.commandFn(options) : commandsManager.runCommand('storeSegmentation', options, 'CORNERSTONE')
  commandsManager.registerCommand('SEGMENTATION', 'storeSegmentation', { commandFn, mended: true })
}

const extension = {
  id: 'bipvl-label',
  onModeEnter: ({ commandsManager }) => mendExport(commandsManager),
  getPanelModule: ({ extensionManager }) => {
    const Panel = () => element('div', {
      style: { height: '100%', overflowY: 'auto' },
      children: [
        element('div', { key: 'label' }, attach),
        element('style', { key: 'style', children: NO_MENU }),
        element('div', {
          key: 'tools',
          className: 'bipvl-tools',
          children: element(extensionManager.getModuleEntry(TOOLS).component, { configuration: {} }),
        }),
      ],
    })
    return [{ name: 'label', iconName: 'tab-segmentation', iconLabel: 'Label', label: 'MONAI Label', component: Panel }]
  },
}

const mode = {
  id: '@ohif/mode-monai-label', // the first mode of an id is used
  modeFactory: async ({ loadModules }) => {
    const [stock] = await loadModules(['@ohif/mode-segmentation'])
    const base = await stock.modeFactory({})
    return {
      ...base,
      id: '@ohif/mode-monai-label',
      routeName: 'monai-label',
      displayName: 'MONAI Label',
      hangingProtocol: 'mpr',
      isValidMode: ({ modalities }) => ({
        valid: modalities.split('\\').some(modality => ['CT', 'MR'].includes(modality)),
        description: 'Only CT and MR can be annotated here',
      }),
      routes: [{
        path: 'monai-label',
        layoutTemplate: () => ({
          id: LAYOUT,
          props: {
            leftPanels: [STUDIES],
            leftPanelClosed: true, // more room for images
            rightPanels: [PANEL],
            viewports: VIEWPORTS.map(([namespace, handler]) => ({ namespace, displaySetsToDisplay: [handler] })),
          },
        }),
      }],
      onModeEnter: managers => {
        base.onModeEnter(managers)
        managers.servicesManager.services.customizationService.addModeCustomizations([
          // Segments are the task's: none is renamed, added or deleted, and all are listed.
          { id: 'PanelSegmentation.disableEditing', disableEditing: true },
          { id: 'PanelSegmentation.showAddSegment', showAddSegment: false },
          { id: 'PanelSegmentation.tableMode', mode: 'expanded' },
        ])
        session.start(managers.servicesManager.services)
        session.review.start()
      },
      onModeExit: managers => {
        session.review.stop()
        session.stop()
        base.onModeExit(managers)
      },
    }
  },
}

window.config.extensions.push(extension)
window.config.modes.unshift(mode)
